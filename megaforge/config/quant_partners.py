"""What the flags of quantization need beside them."""

from __future__ import annotations

from megaforge.config.run_partners import Partner


def of_model(*names: str) -> tuple[str, ...]:
    """Their keys."""
    return tuple(f"model.{name}" for name in names)


QUANTIZATION = (
    Partner(
        ("parallel.zero_quantized_gather",),
        lambda c: c.parallel.zero_stage,
        "nothing is gathered: add --zero 1",
    ),
    Partner(
        ("parallel.zero_quantized_gather",),
        lambda c: c.model.quantize_weights,
        "no matrix is quantized: add --quantize-weights ternary",
    ),
    Partner(
        ("parallel.zero_quantized_gather",),
        lambda c: c.model.quant_granularity == "tensor" and not c.model.quant_noise and c.model.quant_clip == "none",
        "a code that travels is that of a whole matrix's step as it was trained with: leave --quant-granularity at "
        "tensor, --quant-noise at 0 and --quant-clip at none",
    ),
    Partner(
        ("parallel.zero_quantized_gather",),
        lambda c: c.qat.quant_lambda is None and not c.qat.quant_stages and not c.qat.log_quantization,
        "weights themselves are needed where quantization comes in by and by, and for its statistics: leave out "
        "--quant-lambda, --quant-stages and --log-quantization",
    ),
    Partner(
        of_model("quant_granularity", "quant_scale_dtype", "asymmetric_weights", "quant_noise"),
        lambda c: c.model.quantize_weights,
        "no matrix is quantized: add --quantize-weights ternary",
    ),
    Partner(
        ("qat.quant_lambda", "qat.quant_stages", "qat.log_quantization"),
        lambda c: c.model.quantize_weights,
        "no matrix is quantized: add --quantize-weights ternary",
    ),
    Partner(
        ("qat.quant_lambda",),
        lambda c: c.qat.quant_lambda_end_iters or c.length.quant_lambda_end_epochs,
        "it does not say when lambda is 1: add --quant-lambda-end-iters N",
    ),
    Partner(
        (
            *("qat.quant_lambda_start_iters", "qat.quant_lambda_end_iters"),
            *("length.quant_lambda_start_epochs", "length.quant_lambda_end_epochs"),
        ),
        lambda c: c.qat.quant_lambda,
        "lambda is 1 from the beginning: add --quant-lambda linear",
    ),
    Partner(
        ("qat.quant_lambda_steps",),
        lambda c: c.qat.quant_lambda == "step",
        "lambda does not grow in steps: add --quant-lambda step",
    ),
    Partner(
        ("qat.quant_lambda_sharpness",),
        lambda c: c.qat.quant_lambda in ("exponential", "sigmoid"),
        "no lambda goes by it: add --quant-lambda exponential or --quant-lambda sigmoid",
    ),
    Partner(
        ("qat.quant_stages",),
        lambda c: not c.qat.quant_lambda and c.optimizer.second_stage_at is None,
        "stages have their own lambda and factors: leave out --quant-lambda and --second-stage-at",
    ),
    Partner(
        ("qat.quant_stages",),
        lambda c: (
            c.qat.stages[-1].weights == c.model.quantize_weights
            and c.qat.stages[-1].activations == (c.model.activation_kind or "none")
            and c.qat.stages[-1].share == 1
        ),
        "the last stage is not the model of --quantize-weights and --quantize-activations, with lambda 1",
    ),
    Partner(
        ("qat.calibration_interval", "qat.calibration_samples", "qat.calibration_ema"),
        lambda c: c.model.online_calibration,
        "activations have steps of their tokens: add --online-calibration",
    ),
    Partner(
        of_model("quant_clip"),
        lambda c: c.model.quant_clip == "activations" or c.model.quantize_weights,
        "no matrix is quantized: add --quantize-weights ternary",
    ),
    Partner(
        of_model("quant_clip"),
        lambda c: c.model.quant_clip == "weights" or c.model.activation_kind,
        "no activation is quantized: add --quantize-activations int8, or use --quant-clip weights",
    ),
    Partner(
        of_model("quant_clip"),
        lambda c: c.training.eval_iters,
        "it chooses by evaluations: add --eval-iters N",
    ),
    Partner(
        ("qat.quant_clip_interval", "qat.quant_clip_grid"),
        lambda c: c.model.quant_clip != "none",
        "no range is chosen: add --quant-clip weights, activations or both",
    ),
    Partner(
        of_model("quant_group_size"),
        lambda c: c.model.quantize_weights and c.model.quant_granularity == "group",
        "no scale belongs to a group: add --quantize-weights and --quant-granularity group",
    ),
    Partner(
        of_model("bitnet_layers"),
        lambda c: c.model.quantizes,
        "nothing is quantized: add --quantize-weights ternary",
    ),
    Partner(
        of_model("asymmetric_activations", "hadamard", "online_calibration"),
        lambda c: c.model.activation_kind,
        "no activation is quantized: add --quantize-weights ternary, or --quantize-activations int8",
    ),
)
