"""Where moeft meets transformers and PEFT. The only place that patches either."""
