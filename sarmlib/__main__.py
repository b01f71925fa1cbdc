"""Command line: ``python -m sarmlib <command>``; ``make`` calls nothing else."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import sys
from pathlib import Path

from . import commands as extra_commands
from .errors import ConfigError, SarmlibError

_CHECKOUT = Path(__file__).resolve().parents[1]
REPOSITORY = _CHECKOUT if (_CHECKOUT / "pyproject.toml").exists() else Path.cwd()


def _root(arguments) -> Path:
    from .artifacts import default_root
    if arguments.runs:
        os.environ["SARMLIB_RUNS"] = str(Path(arguments.runs).resolve())
    return default_root(Path(arguments.profile).stem)


def _run(arguments):
    from .stages import Run
    return Run(arguments.profile, data=getattr(arguments, "data", None), root=_root(arguments))


def reproduce(arguments) -> None:
    """Run every notebook with a profile; print times, figures and a verdict on each claim."""
    from .profiles import load_profile
    from .runner import run_notebooks
    root = _root(arguments)
    profile = load_profile(arguments.profile, data=arguments.data)
    if arguments.dry_run:
        from .plan import lines
        print(lines(profile, arguments.hardware, arguments.devices))
        return
    _run(arguments).check_hub()
    runs = run_notebooks(arguments.profile, arguments.notebooks, runs=root.parent, data=profile.data,
                         force=arguments.force)
    fresh = any(run.status == "ran" for run in runs)
    for one in runs:
        print(f"{one.name:<26} {one.status:<10} {one.seconds:6.0f} s   {one.output}")
    if fresh:
        times = _run(arguments).stage_times()
        print("\nwork per stage (processor seconds of all jobs; two run side by side), and peak memory:")
        print(times.round({"seconds": 1, "peak_mib": 0}).to_string())
    print(f"\nfigures: {root / 'figures'}\n")
    verify(arguments)


def verify(arguments) -> None:
    """Print one line per claim of the last run and the state of the stored artifacts."""
    from .artifacts import Store
    from .claims import verdicts
    root = _root(arguments)
    table = verdicts(root / "results")
    for row in table.itertuples():
        value = "" if row.value is None or row.value != row.value else f"{row.value:.4g}"
        sampled = row.low == row.low and row.low is not None and row.low < row.high
        interval = f"[{row.low:.3g}, {row.high:.3g}]" if sampled else ""
        print(f"{row.id:<4} {row.verdict:<19} {row.title:<54} {value:>10} {interval:<18} paper: {row.paper}")
    problems = {name: found for name, found in Store(root).verify().items() if found}
    for name, found in problems.items():
        print(f"damaged artifact {name}: {'; '.join(found)} (it will be rebuilt when needed)")
    counts = table.verdict.value_counts()
    print("\n" + ", ".join(f"{count} {name}" for name, count in counts.items())
          + f" - profile {Path(arguments.profile).stem}; stored artifacts: {'damaged' if problems else 'whole'}")


def figures(arguments) -> None:
    """Draw every figure again from stored artifacts, without training, and copy them to figures/<profile>."""
    import shutil

    from . import gallery
    run = _run(arguments)
    run.store.read_only = True
    names = gallery.draw_all(run)
    target = REPOSITORY / "figures" / run.profile.name
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        for suffix in (".png", ".pdf", ".csv", ".txt"):
            shutil.copyfile((gallery.folder(run) / name).with_suffix(suffix), (target / name).with_suffix(suffix))
    print(f"{len(names)} figures in {gallery.folder(run)} and {target}")


def report(arguments) -> None:
    """Print the claims and results tables of the last run; those of the toy profile go into the README."""
    from .claims import verdicts
    from .report import claims_markdown, replace_between, results_markdown
    folder = _root(arguments) / "results"
    parts = {"claims": claims_markdown(verdicts(folder)), "results": results_markdown(folder)}
    for name, text in parts.items():
        if Path(arguments.profile).stem == "toy" and (REPOSITORY / "README.md").exists():
            replace_between(REPOSITORY / "README.md", name, text)
        print(text, end="\n\n")


def notebooks(arguments) -> None:
    """Execute the notebooks at the toy profile and write their outputs into the committed files."""
    from .runner import refresh_committed
    for one in refresh_committed(arguments.names or None):
        print(f"{one.name:<26} {one.status:<10} {one.seconds:6.0f} s")


def backbone(arguments) -> None:
    """Pretrain the shipped toy backbone again, probe it, and write it with its card."""
    from .data.toyworld.card import make_backbone
    print(make_backbone(Path(arguments.work)))


def badges(arguments) -> None:
    """Put Colab links and the Colab install cell for a public repository into the notebooks and the README."""
    from .report import write_badges
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.repo):
        raise ConfigError(f"--repo {arguments.repo!r}: give owner/name")
    for path in write_badges(REPOSITORY, arguments.repo):
        print(path)


def doctor(arguments) -> None:
    """Print what a report of a problem needs: versions, devices, memory, disk, hub, profiles, artifacts, next step."""
    import shutil

    import torch

    from .artifacts import Store, versions
    from .backbone import _hub_reachable
    from .profiles import load_profile, profile_names

    def line(name: str, text) -> None:
        print(f"{name:<14} {text}")

    for name, version in versions().items():
        line(name, version)
    cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    line("cores", f"{os.cpu_count()}, of which this process may use {_usable_cores()}")
    line("gpu", ", ".join(f"{one.name} ({one.total_memory / 2**30:.0f} GiB)" for one in cuda) or "none")
    memory = _memory_gib()
    line("memory", "unknown" if memory is None else f"{memory:.1f} GiB")
    root = _root(arguments)
    disk = shutil.disk_usage(next(p for p in (root, *root.parents) if p.exists())).free / 2**30
    line("free disk", f"{disk:.0f} GiB where artifacts go")
    line("hub", "can be reached" if _hub_reachable() else "cannot be reached: only toy and local will run")
    line("hub token", "set" if os.environ.get("HF_TOKEN") else "not set (needed for gated models only)")
    line("hub cache", os.environ.get("HF_HOME", "~/.cache/huggingface"))
    for name in profile_names():
        profile = load_profile(name, data="." if name == "local" else None)
        lacking = [what for what, bad in (("a GPU", profile.device == "cuda" and not cuda),
                                          ("memory", memory is not None and memory < 3),
                                          ("disk", disk < 1)) if bad]
        line("profile", f"{name:<10} {'fits' if not lacking else 'lacks ' + ', '.join(lacking)}; {profile.hardware}; "
                        f"{profile.cost}")
    stored = len(Store(root).artifacts())
    line("artifacts", f"{stored} of profile {Path(arguments.profile).stem} in {root}")
    line("next", "make verify (which claims hold), make reproduce (finds what is done)" if stored
         else "make reproduce (the toy profile needs no network and under ten minutes)")


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sarmlib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(function, profile=True):
        command = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        command.set_defaults(function=function)
        if profile:
            command.add_argument("--profile", default="toy", help="name of a profile or path of a YAML file")
            command.add_argument("--runs", help="folder of all profiles' artifacts (default: runs)")
        return command

    command = add(reproduce)
    command.add_argument("--data", help="your folder, for profiles whose sources are 'data'")
    command.add_argument("--force", action="store_true", help="run unchanged notebooks too")
    command.add_argument("--dry-run", action="store_true", help="print tokens, memory, disk and hours; start nothing")
    command.add_argument("--hardware", default="h100", help="accelerator that --dry-run plans for, for example l4")
    command.add_argument("--devices", type=int, default=1, help="how many of them")
    command.add_argument("--notebooks", nargs="+", help="only these (names without .ipynb)")
    for function in (verify, figures, report, doctor):
        add(function)
    commands.choices["figures"].add_argument("--data", help="your folder, for profiles whose sources are 'data'")
    add(notebooks, profile=False).add_argument("names", nargs="*", help="only these (names without .ipynb)")
    add(backbone, profile=False).add_argument("--work", default="runs/backbone", help="folder of its checkpoints")
    add(badges, profile=False).add_argument("--repo", required=True, help="owner/name of the public repository")
    for module in sorted(pkgutil.iter_modules(extra_commands.__path__), key=lambda found: found.name):
        one = importlib.import_module(f"{extra_commands.__name__}.{module.name}")
        command = commands.add_parser(module.name.replace("_", "-"), help=one.HELP, description=one.HELP)
        command.set_defaults(function=one.run)
        one.add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; errors of the library are printed as one sentence, exit status 1."""
    arguments = _parser().parse_args(argv)
    if bad := [value for value in vars(arguments).values() if isinstance(value, str) and "\0" in value]:
        print(f"error: {bad[0]!r} holds a null character; no file or setting can have one", file=sys.stderr)
        return 1
    try:
        arguments.function(arguments)
    except SarmlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        from .artifacts import STORAGE
        if error.errno not in STORAGE:
            raise
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}; {STORAGE[error.errno]}",
              file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept, run the same command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
