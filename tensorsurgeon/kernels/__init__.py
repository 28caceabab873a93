"""The few inner loops that are compiled, each beside its plain reference."""
