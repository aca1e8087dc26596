"""The command line, the only room that prints.

From top to bottom, an import may only point down:

    app          `hookattn demo`, `hookattn record`, `hookattn inspect`
    demo         the demo's small Vision Transformer and the scenes it was trained on
"""
