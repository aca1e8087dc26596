"""Pictures of maps.

From top to bottom, an import may only point down:

    plot         one picture of a forward, drawn with matplotlib
"""
