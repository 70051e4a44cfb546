"""The PEFT triple: config.py, layer.py, model.py, and how PEFT comes to know them."""
