"""`expert_adapter` beside linear layers for each expert, whole adapters side by side, and all of it in two products."""


def test_expert_adapter(measured, case, way):
    measured(case, way)
