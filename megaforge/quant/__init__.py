"""Quantized matrices: binary, ternary and integer weights times quantized activations."""

from megaforge.quant.bitnet_linear import BitNetLinear, ConversionReport, convert_model_to_bitnet

__all__ = ["BitNetLinear", "ConversionReport", "convert_model_to_bitnet"]
