"""A whole fusion model, serving and one training step, beside the released way or with its prompts concatenated by hand."""


def test_model(measured, case, way):
    measured(case, way, stage="model")
