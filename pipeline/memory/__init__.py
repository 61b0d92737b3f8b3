"""What makes long sequences fit: each feature attaches to one model instance and leaves parameter names unchanged."""
