"""In-scope prompts: paraphrases, implications and the contexts that they are read in."""
