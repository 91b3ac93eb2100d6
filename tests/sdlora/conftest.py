"""Small real models: timm's own vision transformer at tiny size."""

import pytest

from sdlora.classifier import ModelState
from sdlora.formulations import FORMULATIONS
from tests.support.tiny_model import learn, settings


@pytest.fixture(scope="session")
def three_steps() -> dict[str, ModelState]:
    """Three learned steps in each formulation."""
    return {name: learn(3, chosen=settings(name)) for name in FORMULATIONS}
