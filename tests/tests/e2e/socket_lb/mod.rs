//! Virtual service addresses by eBPF: real sockets connect to them, and real endpoints answer.
#![allow(clippy::indexing_slicing, reason = "a test fails by panicking")]

mod changes;
mod cost;
mod policies;
mod stage;
mod tcp;
mod udp;

use crate::{machine::Need, suite::Suite};

const NEEDS: &[Need] = &[Need::Ebpf, Need::CgroupV2];

pub(crate) fn register(suite: &mut Suite) {
    suite.add("service_lb_tcp_connections_take_turns", NEEDS, tcp::take_turns);
    suite.add("service_lb_ipv6_sockets_reach_virtual_addresses", NEEDS, tcp::ipv6_sockets);
    suite.add("service_lb_without_endpoints_connections_are_refused", NEEDS, tcp::refused);
    suite.add("service_lb_other_destinations_are_untouched", NEEDS, tcp::untouched);
    suite.add("service_lb_no_programs_without_a_cgroup", NEEDS, tcp::no_cgroup);
    suite.add("service_lb_connected_udp_sockets_see_the_virtual_address", NEEDS, udp::connected);
    suite.add("service_lb_unconnected_udp_sockets_keep_an_endpoint", NEEDS, udp::unconnected);
    suite.add("service_lb_unconnected_udp_sockets_use_many_services", NEEDS, udp::many_services);
    suite.add("service_lb_many_udp_sockets_do_not_displace_each_other", NEEDS, udp::many_sockets);
    suite.add("service_lb_affinity_keeps_a_client_until_it_pauses", NEEDS, policies::affinity);
    suite.add("service_lb_least_connections_count_open_sockets", NEEDS, policies::least_connections);
    suite.add("service_lb_policies_choose_as_they_say", NEEDS, policies::shares);
    suite.add("service_lb_turns_are_exact_on_all_cpus", NEEDS, policies::exact_turns);
    suite.add("service_lb_a_removed_endpoint_gets_no_new_connection", NEEDS, changes::removed_under_load);
    suite.add("service_lb_no_connection_meets_a_table_in_parts", NEEDS, changes::whole_tables);
    suite.add("service_lb_the_kernel_has_what_the_catalog_says", NEEDS, changes::read_back);
    suite.add("service_lb_a_full_map_takes_whole_tables_only", NEEDS, changes::too_many_slots);
    suite.add("service_lb_a_call_costs_little", NEEDS, cost::of_calls);
}
