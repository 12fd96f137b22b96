"""Announce the quantizer to transformers. Imported when transformers' own registry of quantizers is."""

from transformers.quantizers.auto import register_quantization_config, register_quantizer

from moeft.integration.nf4_config import QUANT_METHOD, NF4Config
from moeft.integration.quantizer import NF4Quantizer

register_quantization_config(QUANT_METHOD)(NF4Config)
register_quantizer(QUANT_METHOD)(NF4Quantizer)
