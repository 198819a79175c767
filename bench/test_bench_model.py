"""Compare a whole fusion model, serving and training, with the released way or with prompts concatenated by hand."""


def test_model(measured, case, way):
    measured(case, way, stage="model")
