"""Pure functions of tensors: no model, no tokenizer, no cache, nothing printed."""
