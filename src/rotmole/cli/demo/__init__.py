"""The demo: RotMoLE and its scalar twin trained and compared."""
