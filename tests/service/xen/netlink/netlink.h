/* Stands in for libnl's: of the netlink mode, which is never run here, only the kernel's own names are compiled. */
#include <linux/netlink.h>
