// All that a translated kernel includes.
#pragma once

#include "warp.h"
