"""``python -m sarmlib browse``: write the feature browser of a finished run as static pages."""

from __future__ import annotations

from pathlib import Path

HELP = "write the feature browser of a finished run: static pages, no script, no network"


def add_run(parser) -> None:
    """Options that name a finished run."""
    parser.add_argument("--profile", default="toy", help="name of a profile or path of a YAML file, already run")
    parser.add_argument("--runs", help="folder of all profiles' artifacts (default: runs)")
    parser.add_argument("--data", help="your folder, for profiles whose sources are 'data'")
    parser.add_argument("--seed", type=int, help="which of the profile's seeds (default: its first)")


def open_run(arguments):
    """(Run that makes nothing, seed); raises what says how to make what is missing."""
    from ..artifacts import default_root
    from ..errors import ConfigError
    from ..stages import Run
    name = Path(arguments.profile).stem
    found = Run(arguments.profile, data=arguments.data, progress=False,
                root=Path(arguments.runs) / name if arguments.runs else default_root(name))
    found.store.read_only = True
    seed = found.profile.seed if arguments.seed is None else arguments.seed
    if seed not in found.profile.seeds:
        raise ConfigError(f"--seed {seed}: profile {found.profile.name} has the seeds {list(found.profile.seeds)}")
    return found, seed


def add_arguments(parser) -> None:
    add_run(parser)
    parser.add_argument("--output", required=True, help="folder of the pages")
    parser.add_argument("--features", type=int, default=500, help="most pages of features: labelled ones first, then "
                                                                  "by contribution")
    parser.add_argument("--pairs", type=int, default=20, help="pages that take the margin of a pair apart")
    parser.add_argument("--redact", action="store_true", help="no text of prompts, responses and labels: numbers and "
                                                              "hashes only")


def run(arguments) -> None:
    from ..errors import ConfigError
    from ..gallery import browser_of
    if arguments.pairs < 0:
        raise ConfigError(f"--pairs {arguments.pairs}: at least 0")
    found, seed = open_run(arguments)
    browser, provenance = browser_of(found, seed, redact=arguments.redact, n_features=arguments.features)
    made = browser.write(arguments.output, provenance, arguments.pairs)
    print(f"{made['features']} features and {made['pairs']} pairs in {made['files']} files, "
          f"{made['bytes'] / 1e6:.1f} MB: open {Path(arguments.output) / 'index.html'}")
