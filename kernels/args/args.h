// The contracts of all kernels.
#pragma once
#include "attention.h"
#include "matmul.h"
#include "rows.h"
#include "sampling.h"
