"""The playground: real code, small world. Ordinary model folders that learn in minutes on a CPU."""
