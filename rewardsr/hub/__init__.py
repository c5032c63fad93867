"""The Hugging Face Hub: fetching, publishing, the model card."""
