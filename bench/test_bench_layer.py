"""A prompted attention layer, projections included, beside the released way: prompts go through the layer with the tokens."""


def test_layer(measured, case, way):
    measured(case, way, stage="model")
