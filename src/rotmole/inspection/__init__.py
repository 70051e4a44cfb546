"""Inspection: what experts, weights and angles did, and which laws an adapter keeps."""
