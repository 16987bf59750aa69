"""Text to tokens and back: tokenizer, chat template, grammars, completions. No torch."""
