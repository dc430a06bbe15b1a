// Reads of captured tensors, and the sums of their gradients. One index per dimension, each a
// scalar or a vector; negative ones wrap once. Dead lanes touch no memory and give 0. A live lane
// that is out of bounds touches no memory either, gives 0 and is reported through Env::fault.
#pragma once
#include "cpu/capture_gather.h"
#include "cpu/capture_scatter.h"
