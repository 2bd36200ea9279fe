"""What the stages of training feed and minimise: a source of samples and a loss module for each task."""
