// Functions of this folder run on the host and in CUDA kernels.
#pragma once

#ifdef __CUDACC__
#define AE_HD __host__ __device__
#else
#define AE_HD
#endif
