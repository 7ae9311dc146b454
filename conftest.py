"""What every test here has: of Hypothesis's examples no deadline, since how long one takes is the machine's affair."""

from hypothesis import settings

settings.register_profile("exmy", parent=settings(), deadline=None)
settings.load_profile("exmy")
