"""The command line, the only room that prints.

From top to bottom, an import may only point down:

    app          `hookattn` and its commands
    run_demo     `hookattn demo`: a small trained model on a scene drawn for the occasion
    explore      `hookattn explore`: a page to explore the attention of any model of timm on photos
    record       `hookattn record`: any model of timm on any photo
    inspect      `hookattn inspect`: what attention a model has, and how it is read
    picture      the picture that is written
    models       models of timm by name, with weights from the hub or a file
    output       what is printed, and how an error is answered
    demo         the demo's small Vision Transformer and the scenes it was trained on
"""
