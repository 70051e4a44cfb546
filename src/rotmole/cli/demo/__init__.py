"""The demo: LoRA, MoE-LoRA and RotMoLE of equal parameters, trained and compared."""
