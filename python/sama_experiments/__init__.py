"""Programs that repeat the experiments of "Making Scalable Meta Learning Practical".

They use only the public interface of ``sama_kernels``. ``python -m sama_experiments`` lists them.
"""
