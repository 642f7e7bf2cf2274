from tests.support.reference import *  # noqa: F403
