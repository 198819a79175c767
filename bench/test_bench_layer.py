"""Compare a prompted attention layer, including projections, with the released way of passing prompts through it as tokens."""


def test_layer(measured, case, way):
    measured(case, way, stage="model")
