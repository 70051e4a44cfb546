"""Training: one run file in, one run folder out.

Nothing is imported here: callbacks.py needs no more than transformers, the rest the extra [train].
"""
