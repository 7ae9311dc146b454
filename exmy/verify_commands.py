"""Commands that prove: `exmy verify` and `exmy vectors`. Heavy imports wait inside, as in `cli`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from exmy import completing
from exmy.refused import INTERRUPTED, Refused


@click.command()
@click.argument("implementation", metavar="[IMPLEMENTATION]", required=False)
@click.argument("formats", metavar="[FORMAT]...", nargs=-1, shell_complete=completing.formats)
@click.option(
    "--format",
    "more",
    metavar="FORMAT",
    multiple=True,
    shell_complete=completing.formats,
    help="The same, as an option.",
)
@click.option(
    "--input",
    "dtype",
    type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
    help="What it is given; float32 where it takes that.",
)
@click.option(
    "--rounding", default="found", show_default=True, help="What it is judged by, or stochastic; the one it has."
)
@click.option("--overflow", default="found", show_default=True, help="What it is judged by: a mode, or the one it has.")
@click.option("--zero", default="found", show_default=True, help="signed, unsigned, or what it does.")
@click.option("--subnormals", default="found", show_default=True, help="kept, flushed, flushed_early, or what it does.")
@click.option("--rule", default="found", show_default=True, help="Of scales: floor, ceil, rceil, nearest, even, amax.")
@click.option(
    "--level",
    type=click.Choice(["quick", "conditional", "exhaustive"]),
    default="conditional",
    show_default=True,
    help="How much is proved; exhaustive takes half a minute a format.",
)
@click.option(
    "--takes", type=click.Choice(["tensor", "array", "codes"]), default="tensor", help="What MODULE:FUNCTION is given."
)
@click.option("--gives", type=click.Choice(["values", "codes"]), default="values", help="What MODULE:FUNCTION gives.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where MODULE:FUNCTION is given tensors."
)
@click.option("--bias", default=0.0, help="Allowed to stochastic rounding: 2^-N for N random bits.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="How long one call may take before it counts as hanging.",
)
@click.option(
    "--json", "certificate", metavar="FILE", type=click.Path(path_type=Path), help="Write the certificate too."
)
@click.option(
    "--against", metavar="FILE", type=click.Path(path_type=Path), help="Say what differs from an earlier certificate."
)
@click.option(
    "--matrix",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Judge all that is here, and write the table as a page, a picture, a dataset and certificates.",
)
@click.option(
    "--from",
    "certificates",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="With --matrix: of these certificates, and judge nothing.",
)
def verify(
    implementation: str | None, formats: tuple[str, ...], more: tuple[str, ...], certificate: Path | None,
    against: Path | None, matrix: Path | None, certificates: tuple[Path, ...], **asked: Any,
) -> None:  # fmt: skip
    """Judge a quantiser by the laws of its format, and show the smallest input that breaks each.

    IMPLEMENTATION is exmy (our own), a library that is installed (torch, torch-compiled, torch-cuda, ml_dtypes, gfloat, pychop,
    qtorch, torchao, ...), or MODULE:FUNCTION, from tensor to tensor. First it is found out what it does where standards leave a
    choice, and it is judged by that, unless options say by what. Without IMPLEMENTATION: the complete proof of our own, all 2^32
    FP32 inputs of 17 formats and more, about ten minutes on two cores; its certificate is exmy-certificate.json. Exit status 0
    if every law is kept, 1 if one is broken, 2 for bad input.

    \b
    Example: exmy verify torch e4m3fn e5m2 --input float64
    Example: exmy verify ml_dtypes
    Example: exmy verify mypackage.kernels:to_fp8 --format e4m3fn --input float32 --overflow saturate
    Example: exmy verify --matrix conformance

    A matrix that is stopped by Ctrl-C keeps its judgements in FOLDER; the same command goes on with the others.
    """  # noqa: D301
    from exmy.verify import Asked, Request, answer

    sys.path.insert(0, str(Path.cwd()))  # MODULE may be the user's own, beside which they stand
    request = Request(implementation, (*formats, *more), Asked(**asked), certificate, against, matrix, certificates)
    try:
        sys.exit(answer(request))
    except ValueError as error:
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"{error.filename or certificate or matrix}: {error.strerror}; name another place") from None
    except KeyboardInterrupt:
        click.echo(f"\nexmy: stopped; {request.kept()}", err=True)
        sys.exit(INTERRUPTED)


@click.command()
@click.argument("name", metavar="NAME", shell_complete=completing.formats)
@click.option(
    "--from", "input_format", metavar="FORMAT", default="fp32", show_default=True, help="Format of the inputs."
)
@click.option(
    "--rounding", "roundings", multiple=True, help="One of them, or several; all deterministic ones by default."
)
@click.option(
    "--overflow", "overflows", multiple=True, help="One of them, or several; all that NAME has a use for by default."
)
@click.option(
    "--every", is_flag=True, help="All inputs, where they have at most 16 bits; of at most 8 bits it is always all."
)
@click.option("--decode", is_flag=True, help="The other way: the value of each code, in bits of FP32 (or FP64).")
@click.option("--as", "file_format", type=click.Choice(["csv", "hex"]), help="By the suffix of --out, else csv.")
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), help="Standard output by default.")
def vectors(
    name: str, input_format: str, roundings: tuple[str, ...], overflows: tuple[str, ...], every: bool, decode: bool,
    file_format: str | None, out: Path | None,
) -> None:  # fmt: skip
    """Test vectors for RTL and C++ benches: input bits, rounding, overflow, expected code, by exact rationals.

    Complete for inputs of at most 8 bits; for wider ones the decision points: both sides of every value and of every point
    between two values, where a monotone quantiser can go wrong. CSV has a heading; hex is for $readmemh, with its fields
    explained in comments.

    \b
    Example: exmy vectors e4m3fn --from bf16 --rounding nearest_even --out e4m3fn.hex
    Example: exmy vectors e2m1fn --from e5m2 > all.csv
    Example: exmy vectors e4m3fn --decode
    """  # noqa: D301
    from exmy.vectors import write_vectors

    try:
        count = write_vectors(
            name, input_format, roundings, overflows, every=every, decode=decode, file_format=file_format, out=out
        )
    except ValueError as error:
        raise Refused(str(error)) from None
    except BrokenPipeError:
        raise  # a reader that has seen enough, as head has
    except OSError as error:
        raise Refused(
            f"{out or 'standard output'}: can't be written ({error.strerror}); name another file with --out"
        ) from None
    except KeyboardInterrupt:
        again = shlex.join(["exmy", *sys.argv[1:]])
        click.echo(f"\nexmy: stopped; nothing was written. To start again: {again}", err=True)
        sys.exit(INTERRUPTED)
    if out is not None:
        click.echo(f"{out}: {count:,} vectors")


COMMANDS = (verify, vectors)
