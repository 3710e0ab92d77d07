// The emulation's bodies of csrc/cuda/cluster.cuh, which says what they mean. The schedule decides
// whether a store_async gets there when it is issued or when nobody can go on without it.
#pragma once

#include "emulation/runtime.h"

namespace fastbptt {

inline int cluster_rank() { return emulation::this_thread().block->rank; }
inline int cluster_size() { return int(emulation::this_thread().block->cluster->blocks.size()); }

inline void cluster_arrive(emulation::Site site = emulation::Site::here()) {
  emulation::cluster_arrive(site);
}
inline void cluster_wait(emulation::Site site = emulation::Site::here()) {
  emulation::cluster_wait(site);
}
inline void sync_cluster(emulation::Site site = emulation::Site::here()) {
  emulation::cluster_arrive(site);
  emulation::cluster_wait(site);
}

template <typename T>
T* map_shared(T* pointer, int rank, emulation::Site site = emulation::Site::here()) {
  return static_cast<T*>(emulation::map_shared(pointer, rank, site));
}

inline uint32_t cluster_address(const void* pointer,
                                emulation::Site site = emulation::Site::here()) {
  return emulation::cluster_address(pointer, site);
}
inline uint32_t map_address(uint32_t address, int rank,
                            emulation::Site site = emulation::Site::here()) {
  return emulation::map_address(address, rank, site);
}

inline void barrier_init(Barrier* barrier, int count,
                         emulation::Site site = emulation::Site::here()) {
  emulation::barrier_init(barrier, count, site);
}
inline void fence_barrier_init() { emulation::fence_barrier_init(); }

inline void barrier_arrive(Barrier* barrier, emulation::Site site = emulation::Site::here()) {
  emulation::barrier_arrive(barrier, /*bytes=*/0, /*arrivals=*/1, site);
}
inline void barrier_arrive_remote(Barrier* barrier, int rank,
                                  emulation::Site site = emulation::Site::here()) {
  emulation::barrier_arrive_remote(barrier, rank, site);
}
inline void barrier_arrive_remote_after_reads(Barrier* barrier, int rank,
                                              emulation::Site site = emulation::Site::here()) {
  emulation::barrier_arrive_remote(barrier, rank, site);
}
inline void barrier_expect_bytes(Barrier* barrier, int bytes,
                                 emulation::Site site = emulation::Site::here()) {
  emulation::barrier_arrive(barrier, bytes, /*arrivals=*/0, site);
}
inline void barrier_arrive_expect_bytes(Barrier* barrier, int bytes,
                                        emulation::Site site = emulation::Site::here()) {
  emulation::barrier_arrive(barrier, bytes, /*arrivals=*/1, site);
}
inline void barrier_wait(Barrier* barrier, int parity,
                         emulation::Site site = emulation::Site::here()) {
  emulation::barrier_wait(barrier, parity, site);
}

template <typename T>
void store_async(T* remote, const T& value, Barrier* remote_barrier,
                 emulation::Site site = emulation::Site::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  emulation::store_async(remote, &value, int(sizeof(T)), remote_barrier, site);
}
template <typename T>
void store_async(uint32_t to, const T& value, uint32_t barrier,
                 emulation::Site site = emulation::Site::here()) {
  store_async(static_cast<T*>(emulation::pointer_to(to, site)), value,
              static_cast<Barrier*>(emulation::pointer_to(barrier, site)), site);
}

}  // namespace fastbptt
