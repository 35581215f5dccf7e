"""The models a user can name: presets, Hugging Face configuration files, and functions of their own."""
