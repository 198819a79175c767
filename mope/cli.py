"""Command line: `mope demo`, `train`, `evaluate`, `predict`, `routes`, `convert`, `run`, `info`, `bench`, `build`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mope.arguments import Parser, ShowVersion, add_device, positive
from mope.extras import missing
from mope.predict import add_predict
from mope.released.run import add_run
from mope.routes import add_routes
from mope.training.commands import add_evaluate, add_train

# Each command imports its dependencies when it runs, so `mope --help` is fast and `mope build` works without transformers.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status."""
    options = parser().parse_args(arguments)
    # The command line is recorded in results.
    options.command_line = shlex.join(["mope", *(sys.argv[1:] if arguments is None else arguments)])
    status: int = options.command(options)
    return status


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    top = Parser(prog="mope", description="Mixture-of-Prompt-Experts multimodal fusion, fast to train and to serve.")
    top.add_argument("--version", action=ShowVersion, help="print the version, and the commit of a checkout")
    commands = top.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", help="train and compare fusion models on handwritten digits and sentences (minutes, offline)"
    )
    demo.add_argument(
        "--system", choices=("mope", "modex"), default="mope", help="prompt experts, or ModeX adapters in a fused model (mope)"
    )
    demo.add_argument(
        "--task",
        choices=("scenes", "digits"),
        default="scenes",
        help="of --system mope: sentences about a place in a scene of four digits, or about a single digit (scenes)",
    )
    demo.add_argument("--pretrain", action="store_true", help="of scenes: train the encoders too, instead of reading them")
    demo.add_argument("--lora", action="store_true", help="of scenes: compare with LoRA as well, which needs peft")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for results, pictures and the model (out/)")
    demo.add_argument("--seeds", type=positive, default=1, metavar="N", help="repeat with N seeds, for mean and deviation (1)")
    add_device(demo)
    demo.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="on the CPU (1: small models gain nothing from more)"
    )
    demo.add_argument("--fast", action="store_true", help="a few steps of everything: seconds, learns nothing")
    demo.add_argument(
        "--export", type=Path, metavar="FOLDER", help="only write questions, scans and encoders there, as data for mope train"
    )
    demo.set_defaults(command=_demo)

    add_train(commands)
    add_evaluate(commands)
    add_predict(commands)
    add_routes(commands)
    add_run(commands)

    convert = commands.add_parser("convert", help="convert a checkpoint of the released code to safetensors, without executing it")
    convert.add_argument("checkpoint", type=Path, metavar="CKPT", help="Lightning's .ckpt")
    convert.add_argument("out", type=Path, metavar="OUT", help="a .safetensors file to write, for mope.load_released_checkpoint")
    convert.set_defaults(command=_convert)

    info = commands.add_parser("info", help="versions, devices, which implementations run here and why the others do not")
    info.set_defaults(command=_info)

    bench = commands.add_parser("bench", help="check the ops on this device, then time them against what you would write instead")
    extent = bench.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="one shape of each op, nothing compiled: about a minute")
    extent.add_argument("--all", action="store_true", help="every listed shape, which takes long")
    bench.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the results and a picture (out/)")
    add_device(bench)
    bench.add_argument("--threads", type=positive, default=1, metavar="N", help="on the CPU (1)")
    bench.set_defaults(command=_bench)

    build = commands.add_parser("build", help="compile the C++ kernels against the installed torch, into the user's cache")
    build.add_argument("--force", action="store_true", help="even if they have been compiled already")
    build.set_defaults(command=_build)
    return top


def _demo(options: argparse.Namespace) -> int:
    if (problem := missing("matplotlib", "sklearn", extras=("train", "plot"))) is not None:
        print(f"mope demo: {problem}", file=sys.stderr)
        return 1
    if options.export and options.system == "modex":
        print("mope demo: --export supports only --system mope, whose data and encoders modex can use too", file=sys.stderr)
        return 1
    if (options.pretrain or options.lora) and (options.system, options.task) != ("mope", "scenes"):
        print("mope demo: --pretrain and --lora belong to --task scenes", file=sys.stderr)
        return 1
    if options.lora and (problem := missing("peft", extras=("demo",))) is not None:
        print(f"mope demo: {problem}", file=sys.stderr)
        return 1
    if options.export:
        from mope.demo.export import export

        export(options.export)
        print(f"{options.export}: train, dev and test, labels.txt, images/, vision/, text/, model/")
        return 0
    import matplotlib

    # Plots are written to files, so no display is needed.
    matplotlib.use("Agg")
    more: dict[str, Any] = {}
    if options.system == "modex":
        from mope.demo.modex.run import demo
    elif options.task == "digits":
        from mope.demo.run import demo
    else:
        from mope.demo.scenes.run import demo

        more = {"anew": options.pretrain, "with_lora": options.lora}
    from mope.finite import NotFiniteError

    try:
        demo(
            out=options.out,
            seeds=options.seeds,
            fast=options.fast,
            device=options.device,
            threads=options.threads,
            command=options.command_line,
            **more,
        )
    except (NotFiniteError, OSError) as error:
        print(f"\nmope demo: {error}", file=sys.stderr)
        return 1
    return 0


def _convert(options: argparse.Namespace) -> int:
    from safetensors import SafetensorError

    from mope.released import read_released_checkpoint

    if options.out.suffix != ".safetensors":
        print(f"mope convert: {options.out} must end in .safetensors", file=sys.stderr)
        return 1
    try:
        checkpoint = read_released_checkpoint(options.checkpoint)
    except (FileNotFoundError, ValueError) as error:
        print(f"mope convert: {error}", file=sys.stderr)
        return 1
    try:
        checkpoint.save(options.out)
    except (OSError, SafetensorError) as error:
        print(f"mope convert: {options.out}: {error}", file=sys.stderr)
        return 1
    method = checkpoint.options.get("fuse_method", "unknown")
    print(f"{options.out}: {len(checkpoint.tensors)} tensors, fusion method {method}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from mope.info import describe

    print(describe())
    return 0


def _bench(options: argparse.Namespace) -> int:
    # CPU memory is measured with torch's profiler, which otherwise prints a line for each row.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from mope.benchmark.run import bench

    return bench(out=options.out, quick=options.quick, everything=options.all, device=options.device, threads=options.threads)


def _build(options: argparse.Namespace) -> int:
    from mope_kernels.build import BuildError, build

    try:
        print(build(force=options.force))
    except BuildError as error:
        print(f"mope build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
