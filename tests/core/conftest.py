"""Property tests here are deterministic and have no deadline: the machine may be busy."""

from hypothesis import settings

settings.register_profile("core", deadline=None, database=None, derandomize=True)
settings.load_profile("core")
