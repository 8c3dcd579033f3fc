raise RuntimeError("broken file")
