"""Where boxes and clicks come from: a file, or a detector.

A detector is built from a path to its weights (device, precision, confidence, max_boxes, classes) and is then called with a list
of images; it answers for each of them, in order, in original pixels. It imports its libraries in the constructor, after it has
looked for the weights. Detectors know no masks, and read no files but their own.
"""

from depthseg.detect.files import BoxesFile, PointsFile

__all__ = ["BoxesFile", "PointsFile"]
