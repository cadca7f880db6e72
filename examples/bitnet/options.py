"""The options of quantization, each with what it is added to: a row of the example's table."""

from __future__ import annotations

from dataclasses import dataclass

TERNARY = ("--quantize-weights", "ternary")
INT4 = ("--quantize-weights", "int4")
GROUPS = (*TERNARY, "--quant-granularity", "group", "--quant-group-size", "64")
QAT = (*TERNARY, "--optimizer", "qat_adam")
LINEAR = (*TERNARY, "--quant-lambda", "linear", "--quant-lambda-end-iters", "{two}")
BY_AND_BY = (*TERNARY, "--quant-lambda", "exponential", "--quant-lambda-end-iters", "{half}")
SECOND = (*TERNARY, "--second-stage-at", "0.5")
STATIC = (*TERNARY, "--online-calibration")
ONCE = (*STATIC, "--calibration-samples", "1")
CLIPPED = (*TERNARY, "--quant-clip", "weights", "--quant-clip-interval", "1")


@dataclass(frozen=True)
class Option:
    """Flags, and the run that they are added to.

    Attributes:
        flags: with it; ``{third}``, ``{half}`` and ``{two}`` are a third, a half and two thirds of the iterations.
        base: without it.
        records: the number that it records, where it changes nothing else.
        distils: with it the run learns from one in full precision, as long as itself.
    """

    flags: tuple[str, ...]
    base: tuple[str, ...] = TERNARY
    records: str | None = None
    distils: bool = False

    @property
    def title(self) -> str:
        """As the table shows it."""
        shown = {(): "full precision", TERNARY: "ternary", INT4: "int4", GROUPS: "ternary groups"}
        shown |= {STATIC: "static steps", ONCE: "static steps, once", CLIPPED: "clipped"}
        hidden = [place - 1 for place, f in enumerate(self.flags) if f.startswith("{") and f.endswith("}")]
        flags = [f for place, f in enumerate(self.flags) if "{" not in f and place not in hidden]
        base = shown.get(self.base) or " ".join(self.base[2:4]).removeprefix("--")
        return f"{' '.join(flags).removeprefix('--')} ({base})"

    def lines(self, iterations: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Flags without and with it, for runs of this length."""
        third = max(iterations // 3, 1)
        places = {"third": third, "half": max(iterations // 2, 1), "two": 2 * third}

        def filled(flags: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(flag.format(**places) for flag in flags)

        return filled(self.base), filled((*self.base, *self.flags))


def _lambda(name: str, *more: str) -> Option:
    return Option(("--quant-lambda", name, *more, "--quant-lambda-end-iters", "{two}"))


OPTIONS = (
    *(Option(("--quantize-weights", kind), base=()) for kind in ("binary", "ternary", "int4", "int8")),
    Option(("--quantize-activations", "none")),
    Option(("--quantize-activations", "int4")),
    Option(("--quantize-activations", "int8"), base=()),
    Option(("--asymmetric-weights",), base=INT4),
    Option(("--asymmetric-activations",)),
    Option(("--quant-granularity", "channel")),
    Option(("--quant-granularity", "group", "--quant-group-size", "64")),
    Option(("--quant-group-size", "32"), base=GROUPS),
    Option(("--quant-scale-dtype", "fp16")),
    Option(("--quant-scale-dtype", "bf16")),
    Option(("--bitnet-layers", "moe")),
    Option(("--quant-noise", "0.5")),
    Option(("--hadamard", "32")),
    Option(("--sub-norm",)),
    _lambda("linear"),
    _lambda("step"),
    _lambda("step", "--quant-lambda-steps", "2"),
    _lambda("exponential"),
    _lambda("sigmoid"),
    Option(("--quant-lambda-start-iters", "1"), base=LINEAR),
    Option(("--quant-lambda-sharpness", "4"), base=BY_AND_BY),
    Option(("--quant-stages", "0:none", "{third}:int8/int8", "{two}:ternary/int8,lr=0.7,wd=0")),
    Option(("--second-stage-at", "0.5")),
    Option(("--second-stage-lr-factor", "0.3"), base=SECOND),
    Option(("--optimizer", "qat_adam")),
    Option(("--qat-damping", "0.1"), base=QAT),
    Option(("--grokfast", "ema")),
    Option(("--online-calibration",)),
    Option(("--calibration-ema", "0.2"), base=STATIC),
    Option(("--calibration-interval", "1"), base=ONCE),
    Option(("--calibration-samples", "4096"), base=ONCE),
    Option(("--quant-clip", "both", "--quant-clip-interval", "{third}")),
    Option(("--quant-clip-interval", "2"), base=CLIPPED),
    Option(("--quant-clip-grid", "1.3", "1.4"), base=CLIPPED),
    Option(("--objective", "distillation"), distils=True),
    Option(("--objective", "distillation", "--distill-relation-weight", "1"), distils=True),
    Option(("--log-quantization",), records="quant_error"),
)
