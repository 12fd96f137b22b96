"""Let PEFT know our modules. Imported when PEFT's LoRA is."""

from moeft.integration import peft_lora

peft_lora.install()
