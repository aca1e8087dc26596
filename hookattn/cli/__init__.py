"""The command line, the only room that prints.

From top to bottom, an import may only point down:

    app          `hookattn`: its commands, and how a mistake is answered
    commands     what can be typed, without torch: a command imports what it runs
    show         `hookattn show`: what is in a store or a file of maps, and one of its images drawn
    run_demo     `hookattn demo`: a small trained model on a scene drawn for the occasion
    explore      `hookattn explore`: a page to explore the attention of any model on photos
    record       `hookattn record`: any model on any photos, and a picture of each
    analyze      `hookattn analyze`: figures of each head over many photos
    extract      `hookattn extract`: attention of a data set into a store
    inspect      `hookattn inspect`: what attention a model has, and how it is read
    picture      the picture that is written
    photos       photos: found, shown to a model, recorded
    models       models by name, with weights from the hub, a folder or a file
    elsewhere    models of transformers and open_clip, with their preprocessing
    checkpoints  files of weights, and how their names fit a model
    asked        what several commands are asked
    files        files that are written: looked at before, whole or not there after
    output       what is printed, and how an error is answered
    demo         the demo's small Vision Transformer and the scenes it was trained on
"""
