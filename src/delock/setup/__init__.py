"""What a run is made of: the checked length, the cuts, what every layer costs, and from these a Job per stage and a prediction."""

from delock.setup.prepare import prepare
from delock.setup.refuse import refuse_uncapturable, refuse_unfit, refuse_wrong_link, refuse_wrong_workers
from delock.setup.setup import Setup
from delock.setup.spec import Layout, Spec

__all__ = ["Layout", "Setup", "Spec", "prepare", "refuse_uncapturable", "refuse_unfit", "refuse_wrong_link", "refuse_wrong_workers"]
