"""The flow policy that the rollout tests draw from; whoever changes its weights changes them back.

A file with another kind of policy overrides the fixture.
"""

import pytest


@pytest.fixture(scope="session")
def policy():
    pytest.importorskip("diffusers")
    from fixtures_flow import sd3_pipeline

    from mmgrpo.policies.flow import FlowPolicy

    return FlowPolicy(sd3_pipeline(), max_prompt_tokens=3)
