"""SDAR through JetEngine: engine.py drives it, versions.py finds it, memory.py says how much memory it is to take."""
