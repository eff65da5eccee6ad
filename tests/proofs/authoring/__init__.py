"""Every authoring method on trained models: its effect, its side effects, a control, and the served variant."""
