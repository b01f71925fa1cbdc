"""``python -m sarmlib serve``: rewards over HTTP, for OpenRLHF and others."""

from __future__ import annotations

from pathlib import Path

HELP = "serve rewards of a saved SARM over HTTP (POST /get_reward, as OpenRLHF's reward server); loopback by default"


def add_arguments(parser) -> None:
    parser.add_argument("--model", required=True, help="folder of a saved SARM with its tokenizer")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; another one opens it to the network")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--max-bytes", type=int, default=4 << 20, help="largest body")
    parser.add_argument("--max-items", type=int, default=512, help="most queries in a request")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens per query; longer ones are cut in front")


def run(arguments) -> None:
    from ..backbone import load_tokenizer
    from ..errors import ConfigError
    from ..sarm.model import SarmForSequenceClassification
    from ..sarm.serving import create_app
    for name in ("port", "max_bytes", "max_items", "max_length"):
        if getattr(arguments, name) < 1 or (name == "port" and arguments.port > 65535):
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: out of range")
    model = SarmForSequenceClassification.from_pretrained(arguments.model)
    app = create_app(model, load_tokenizer(Path(arguments.model)), max_bytes=arguments.max_bytes,
                     max_items=arguments.max_items, max_length=arguments.max_length)
    import uvicorn
    if arguments.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"anyone who reaches {arguments.host}:{arguments.port} can use this model: there is no password")
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")
