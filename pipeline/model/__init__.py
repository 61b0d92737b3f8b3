"""The model: stock transformers, found, built and looked into."""
