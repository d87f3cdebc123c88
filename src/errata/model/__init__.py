"""Reading and intervening on Hugging Face models; knows nothing of edits."""
