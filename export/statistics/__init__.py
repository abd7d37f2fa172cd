"""The statistics graph and what it needs to be run: part of every bundle with norms that have statistics.

    graph     the ONNX model: the bundle's integers; at each norm the images' moments, and the statistics made of them, applied
    groups    which classes answer alike: where there are many, the class mix is one of groups
    measure   each norm's moments for images of each group, on the calibration images
    check     at export: at strength 0 the graph is the engine, and its moments are those of the layers run one by one

It is written for ONNX Runtime and serves every target of a bundle, which all share one set of integers. What the inputs mean is
in `refold.statistics`; the device runs it in `edge.statistics`.
"""
